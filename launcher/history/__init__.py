"""What the events of a run say in all, kept up as they come: for the terminal, the browser and Prometheus alike.

Pure: no file is read here but the record, no clock is asked.
"""
