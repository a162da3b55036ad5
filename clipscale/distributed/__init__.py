"""Process groups, the collectives of the loss, and what starts and ends them."""

GRACE_S = 600
"""What a signalled run has to finish its step or evaluation and to save; torchrun's own 30 s are short."""
RUN_FILE = "CLIPSCALE_RUN_FILE"
"""Names the file in which the launcher of this machine looks for the run's directory."""
