"""What every command stands on: run folders, progress, processes, jobs, downloads. No models, no equations."""
