"""``clipscale audit``: what a model does with groups of images, and what captions say beside words for groups."""
