"""What a command shows of its run while it works, and what is left to look at when it has ended."""
