"""What a model's features are good for: linear probes, neighbours, composition; and how far it generalises."""
