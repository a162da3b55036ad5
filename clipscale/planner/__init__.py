"""What a configuration will take, before it is run: memory, time, and how sure that is."""
