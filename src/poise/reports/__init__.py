"""Pages, figures and model cards, written from the JSON of run folders."""
