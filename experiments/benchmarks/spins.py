"""How long may a thread wait by turning round before it sleeps? Steps of the embedded recipe on two threads, both cores
free, and beside one process that keeps a core busy.

    python experiments/benchmarks/spins.py          # about five minutes, on a machine that does nothing else

Expected: with few turns threads sleep between two operations and waking them takes longer than the work; with many a
busy core makes every operation wait for a time slice. `toco_core.machine.threads.SPINS` is the smallest number with
which a quiet machine loses nothing. Each number has a process of its own: OpenMP reads it when torch is loaded. Writes
experiments/records/benchmarks_spins.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

TURNS = (0, 300, 1000, 2000, 3000, 10_000)
ONE_THREAD = "one thread"


def one_number(steps: int, threads: int) -> list[float]:
    """Seconds of training steps, with the settings that this process was started with."""
    import torch
    from measure import LATE, batch_of, model_of, seconds_of

    from toco_core.config import tiny
    from toco_core.machine.device import keep_freed_memory
    from toco_core.machine.precision import attention_of, autocast_of
    from toco_core.objective import Step, objective

    torch.set_num_threads(threads)
    keep_freed_memory()
    config, cpu = tiny(), torch.device("cpu")
    model = model_of(config, 20)
    model.freeze_blocks(config.schedule.frozen_blocks)
    batch = batch_of(model, config.data.crop_size, config.schedule.batch_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        with attention_of(model, config, cpu):
            total = objective(Step(model, batch, config, LATE, autocast=autocast_of(config, cpu))).total
            optimizer.zero_grad(set_to_none=True)
            total.backward()
        optimizer.step()

    return [seconds_of(step) for _ in range(steps + 2)][2:]


def measured(turns: int | str, steps: int) -> float:
    """The median step in a process of its own."""
    threads = "1" if turns == ONE_THREAD else "2"
    settings = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300" if turns == ONE_THREAD else str(turns)}
    command = [sys.executable, __file__, "--steps", str(steps), "--threads", threads]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    return round(statistics.median(json.loads(done.stdout.splitlines()[-1])), 3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="that are timed of each number")
    parser.add_argument("--turns", type=int, nargs="+", default=list(TURNS))
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        print(json.dumps(one_number(args.steps, args.threads)))
        return
    from measure import machine, write_record

    record = {"question": __doc__.partition("\n\n")[0].replace("\n", " "), "machine": machine(), "seconds": {}}
    for state in ("both cores free", "one core busy"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if state == "one core busy" else None
        try:
            for turns in (*args.turns, ONE_THREAD):
                record["seconds"].setdefault(str(turns), {})[state] = measured(turns, args.steps)
                print(turns, state, record["seconds"][str(turns)][state], flush=True)
        finally:
            if busy:
                busy.kill()
    print("written:", write_record("benchmarks_spins.json", record))


if __name__ == "__main__":
    main()
