"""`poise score`: every head's reward of given completions, their uncertainties, and one objective."""

from pathlib import Path

from poise.data.preferences import read_samples
from poise.errors import PoiseError
from poise.functional.objectives import disagreement, nominal_head, parse_objective, routing_std, total_std
from poise.models.scorer import Scorer
from poise.reward.config import ScoreConfig as Config
from poise.runtime.progress import console, progress
from poise.runtime.run_folder import write_jsonl
from poise.runtime.settings import finite_or_raise


def run(config: Config) -> Path:
    """Write one row per completion, in order; returns the file."""
    objective = parse_objective(config.objective)
    samples = read_samples(config.file, config.on_bad_row)
    path = Path(config.output) if config.output else Path(config.file).with_suffix(".scored.jsonl")
    if path.is_dir():
        raise PoiseError(f"--output {path} is a folder; name a file")
    scorer = Scorer.load(config.reward, config.max_length)
    scorer.layout.check_objective(config.objective)
    with progress("scoring", len(samples)) as advance:
        heads = scorer(samples, advance)
    if scorer.extract.num_truncated:
        console.print(
            f"{scorer.extract.num_truncated} of {len(samples)} samples lost their oldest tokens "
            f"(longer than {scorer.extract.max_length})"
        )
    columns = {
        config.objective: objective(heads),
        "nominal_head": nominal_head(heads),
        "disagreement": disagreement(heads),
        "routing_std": routing_std(heads),
        "total_std": total_std(scorer.layout.calibrated(heads)),
        "mean": heads.mean,
        "std": heads.std,
    }
    listed = finite_or_raise({name: column.tolist() for name, column in columns.items()}, f"{config.file}: the score")
    write_jsonl(
        path,
        [
            {"prompt": sample.prompt, "completion": sample.completion, **{name: col[i] for name, col in listed.items()}}
            for i, sample in enumerate(samples)
        ],
    )
    console.print(f"{len(samples)} completions scored by {scorer.layout.num_heads} heads: {path}")
    return path
