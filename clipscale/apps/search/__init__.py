"""Search in one's own images by what they show: vectors on disk, exact and approximate neighbours, a page."""
