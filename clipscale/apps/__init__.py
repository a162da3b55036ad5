"""What one does with data and with trained models."""
