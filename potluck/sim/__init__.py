"""Deterministic simulation: the real round, DHT and transfer code in virtual time, on a network from one seed."""
