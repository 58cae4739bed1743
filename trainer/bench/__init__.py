"""What a step costs: ours beside other programs at equal settings, each in a process of its own, in alternation."""
