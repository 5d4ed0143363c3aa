"""What a run will take before any device is touched: memory, time, money; arithmetic on the config and a cluster."""
