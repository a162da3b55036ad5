"""The training loop: resume, step, log, evaluate, save, stop."""
