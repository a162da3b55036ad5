"""The data plane: a pure global sample order, and the streams, decoding and batches that follow it."""
