"""What a Python program calls: reward models and trainers, the commands' own, with data in memory and no run folder."""
