"""Process groups, the collectives of the loss, and what starts and ends them."""
