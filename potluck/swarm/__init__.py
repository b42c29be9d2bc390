"""What Potluck exists for: model slices, data, codecs, aggregation, gossip rounds, state transfer, checkpoints."""
