"""The peer: one process with one identity that takes part in a run. Home folder, device, network stack, worker."""
