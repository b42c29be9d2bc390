"""Signed expiring records, the run's manifest and invite, and the directory, on hivemind's Kademlia DHT."""
