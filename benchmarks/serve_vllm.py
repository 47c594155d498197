"""`poise serve`, reading itself, against vLLM's `/classify` on the same cores: groups of completions of one prompt.

    .engines/vllm/bin/python benchmarks/serve_vllm.py [--cores 1] [--callers 4] [--groups 16] [--repeats 5]

One reward model of the first layers of the default model with random heads, float32. All servers run at once, each
bound to the same cores with a thread for each core, and are asked in turn, so that other work on the machine harms all.
A caller sends whole groups, one request each: text to Poise, which renders it, and to vLLM the ids, made before. No
prompt comes twice. Ways: `poise` reads itself; `vllm` with its default settings; `vllm_without_prefix_caching`; and
`poise_with_vllm`, `--backend vllm` before the first vLLM. For each, groups per second, and `cpu_s`: the processor time
of a group in the server's processes, in both servers' for `poise_with_vllm`; other work disturbs it less. One repeat
before the others warms up; ratios are of sums over repeats, above 1 where Poise is faster. Prints JSON; dated results
lie in results/.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import psutil
import torch
from serve_load import HEADS, STORY, make_reward_model

from poise.models.reward_model import read_layout
from poise.models.scorer import Scorer, generated
from poise.runtime.run_folder import environment
from poise.serve.client import Client

Group = tuple[str, list[str]]
Heads = list[list[float]]  # of each completion


def groups(count: int, size: int, prompt_tokens: int, tokens: int, scorer: Scorer, seed: int) -> list[Group]:
    """Prompts and completions of about as many tokens, no two alike: the words of STORY are a token each."""
    generator = torch.Generator().manual_seed(seed)
    known = STORY.split()

    def words(number: int) -> str:
        return " ".join(known[i] for i in torch.randint(len(known), (number,), generator=generator).tolist())

    overhead = len(scorer.extract.encode(generated(f"{seed} 0: ", "a")).prompt)
    return [
        (f"{seed} {i}: {words(prompt_tokens - overhead)}", [words(tokens) for _ in range(size)]) for i in range(count)
    ]


def started(command: list[str], cores: list[int], url: str, path: str, log: Path) -> subprocess.Popen[bytes]:
    """A server bound to cores, once it answers."""
    count = str(len(cores))
    own = {"OMP_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
           "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "POISE_URL": ""}  # fmt: skip
    bound = ["taskset", "-c", ",".join(map(str, cores)), *command]
    with log.open("wb") as file:
        server = subprocess.Popen(bound, env={**os.environ, **own}, stdout=file, stderr=file)
    while True:
        try:
            with urllib.request.urlopen(url + path):
                return server
        except OSError:
            if server.poll() is not None:
                sys.exit(log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)


def timed(ask: Callable[[int], Heads], count: int, callers: int) -> tuple[float, list[Heads]]:
    """(groups per second, means of all heads)"""
    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        answers = list(pool.map(ask, range(count)))
    return count / (time.perf_counter() - start), answers


def cpu_seconds(server: subprocess.Popen[bytes]) -> float:
    """Of a server and all its processes, so far."""
    whole = psutil.Process(server.pid)
    return sum(sum(process.cpu_times()[:2]) for process in [whole, *whole.children(recursive=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[-options.cores :]
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_reward_model(Path(scratch) / "rm", options.layers)
        ports = []
        for _ in range(4):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        urls_of = dict(zip(("vllm", "vllm_without_prefix_caching", "poise", "poise_with_vllm"), urls, strict=True))
        serve = [sys.executable, "-m", "poise.cli", "serve", folder]
        engine = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--runner", "pooling",
                  "--dtype", "float32"]  # fmt: skip
        commands = [
            engine,
            [*engine, "--no-enable-prefix-caching"],
            serve,
            [*serve, "--backend", "vllm", "--url", urls[0]],
        ]
        servers: list[subprocess.Popen[bytes]] = []
        by_way: dict[str, list[subprocess.Popen[bytes]]] = {}
        scorer, layout = Scorer.load(folder), read_layout(folder)
        rows: list[dict[str, float]] = []
        try:
            for (way, url), command in zip(urls_of.items(), commands, strict=True):
                path = "/readyz" if "poise" in way else "/health"
                log = Path(scratch) / f"{way}.log"
                servers.append(started([*command, "--port", url.rpartition(":")[2]], cores, url, path, log))
                by_way[way] = [servers[-1], servers[0]] if way == "poise_with_vllm" else [servers[-1]]

            def ask_vllm(url: str, inputs: list[list[int]]) -> Heads:
                body = json.dumps({"input": inputs, "use_activation": False}).encode()
                request = urllib.request.Request(url + "/classify", body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request) as response:
                    logits = torch.tensor([row["probs"] for row in json.loads(response.read())["data"]])
                return [row.tolist() for row in layout.decode(logits).mean]

            for repeat in range(options.repeats + 1):
                row: dict[str, float] = {}
                for number, (way, url) in enumerate(urls_of.items()):
                    # Prompts of its own for each way: two of them share a cache of prefixes.
                    lengths = options.prompt_tokens, options.tokens
                    asked = groups(options.groups, options.size, *lengths, scorer, 10 * repeat + number)
                    tokens = [[scorer.extract.encode(generated(p, text)) for text in texts] for p, texts in asked]
                    ids = [[[*text.prompt, *text.completion] for text in texts] for texts in tokens]
                    client = Client(url)

                    def ask(
                        i: int, way: str = way, url: str = url, asked: list[Group] = asked, client: Client = client,
                        ids: list[list[list[int]]] = ids,
                    ) -> Heads:  # fmt: skip
                        if "poise" in way:
                            return [scores["mean"] for scores in client.score(*asked[i])]
                        return ask_vllm(url, ids[i])

                    before = sum(map(cpu_seconds, by_way[way]))
                    row[way], heads = timed(ask, options.groups, options.callers)
                    row[f"{way}_cpu_s"] = (sum(map(cpu_seconds, by_way[way])) - before) / options.groups
                    if way == "poise":
                        same = torch.tensor([ask_vllm(urls[0], texts) for texts in ids])
                        row["largest_difference"] = (torch.tensor(heads) - same).abs().max().item()
                rows.append(row)
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    rows = rows[1:]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def total(name: str) -> float:
        """Seconds: of a wall clock for the ways, of processors for their cpu_s."""
        return sum(row[name] if name.endswith("cpu_s") else 1 / row[name] for row in rows)

    ratios = {
        f"over_{other}": {"wall": total(other) / total("poise"), "cpu": total(f"{other}_cpu_s") / total("poise_cpu_s")}
        for other in ("vllm", "vllm_without_prefix_caching", "poise_with_vllm")
    }
    read = {"prompt": len(tokens[0][0].prompt), "completion": len(tokens[0][0].completion)}
    print(
        json.dumps(
            {
                **vars(options), "heads": HEADS, "tokens_read": read, "vllm_version": metadata.version("vllm-cpu"),
                "load_average": os.getloadavg()[0], "rows": rows,
                "medians": medians, **ratios, "environment": environment(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
