#!/usr/bin/env python3
"""Times one decode step of the CUDA runtime beside the best fp16 attention of the same run.

  decode.py --library libkvplan_runtime.so --plans-program decode_plans --plans DIR --out decode.json [--check] [--quick]

For every shape and plan: attention of one new token per sequence straight from packed pages, replayed as a CUDA graph,
in turn with PyTorch SDPA (flash, cuDNN, efficient; the query group as rows) and FlashInfer if it is installed. Needs
torch with CUDA. Results go to --out after every shape; decode_report.py makes the tables.
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import torch

from decode_caches import (PAGE_TOKENS, Fp16Caches, PackedCache, Shape, random_vectors, read_plan, relative_error,
                           rotations)
from kvplan_runtime import Library

PLANS = ("bits2", "bits3", "bits4", "bits8", "k4v2", "k3v2", "mixed8", "mixed16", "trellis8", "fp16")
QUICK_PLANS = ("bits2", "bits3", "bits4", "bits8", "k4v2", "mixed8", "mixed16", "trellis8")
HEADS = ((32, 8), (28, 4), (64, 8), (32, 32))
TARGETS = [Shape(batch, context << 10, 32, 8, 128)
           for batch, context in ((64, 8), (16, 32), (1, 128), (1, 32), (16, 4), (1, 4))]

REPEATS = 11
GRAPH_SECONDS = 1.5e-3  # at least, of one replay: long against the gap between two
ASSUMED_BANDWIDTH = 4e12
SHORTEST_CALL = 8e-6
WARM_SECONDS = 0.2      # of work before anything is timed, for the clocks
MEMORY_SHARE = 0.9      # of the free memory
SCREEN = 1.5            # fp16 kernels that take longer than this times the best are not timed again
COPY_BYTES = 2 << 30
CHECK_CONTEXTS = (1, 4, 67, 68, 132, 1500)
CHECK_LIMIT = 2e-3
APPEND_CACHES = 16      # of a graph of appends: layers of a model
APPEND_CONTEXT = 4 * PAGE_TOKENS
STEPS_AHEAD = 8         # that kvplan_begin_step takes without waiting for the device
HOLD_CYCLES = 4_000_000  # of the device, during which the host queues what is timed


def log(text):
    print(text, file=sys.stderr, flush=True)


def grid():
    """Every shape, those of the targets first, then by size."""
    shapes = [Shape(batch, context << 10, *heads, head_dim)
              for batch in (1, 4, 16, 64, 128) for context in (4, 8, 32, 128) for heads in HEADS
              for head_dim in (64, 128, 256)]
    rest = sorted((s for s in shapes if s not in TARGETS), key=lambda s: s.fp16_bytes)
    return TARGETS + rest


def chosen_plans(options, shape):
    """Names of the plans whose rows are asked for."""
    return [name for name in (QUICK_PLANS if options.quick else PLANS) if options.rows.search(f"{shape} {name}")]


def plan_folder(options, kv_heads, head_dim):
    """Of a geometry; written when it is not there."""
    folder = options.plans / f"h{kv_heads}_d{head_dim}"
    if not all((folder / plan / "plan.json").exists() for plan in PLANS):
        log(f"writing plans to {folder}")
        subprocess.run([options.plans_program, "--out", folder, "--kv-heads", str(kv_heads), "--head-dim",
                        str(head_dim)], check=True, stdout=subprocess.DEVNULL)
    return folder


@dataclass
class Candidate:
    """A captured graph of `calls` attention calls."""
    name: str
    graph: object
    calls: int
    times: list  # microseconds of a call, one per repeat


def graph_calls(copies, touched_bytes):
    """Calls in a graph: whole turns over the copies, long enough to time."""
    turn = copies * max(touched_bytes / ASSUMED_BANDWIDTH, SHORTEST_CALL)
    return copies * max(1, round(GRAPH_SECONDS / turn))


def capture(name, call, calls):
    """`call(i)` queues the i-th call on the current stream."""
    torch.cuda.synchronize()  # the caches are filled on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    return capture_warm(name, call, calls, stream)


def capture_warm(name, call, calls, stream=None):
    """As capture(), for calls that must not come once more."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    return Candidate(name, graph, calls, [])


def timed(work):
    """Seconds of what work() queues; the answer is a function to call once the device is idle."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    return lambda: start.elapsed_time(end) * 1e-3


def warm_up(work):
    """Runs work() until the clocks have risen."""
    start = time.monotonic()
    while time.monotonic() - start < WARM_SECONDS:
        work()
        torch.cuda.synchronize()


def hold():
    """Keeps the device busy while the host queues what is timed, so that no launch is waited for."""
    torch.cuda._sleep(HOLD_CYCLES)


def measure(candidates, repeats):
    """Replays all in turn, every other time in the opposite order."""
    warm_up(lambda: [candidate.graph.replay() for candidate in candidates])
    for repeat in range(repeats):
        order = candidates if repeat % 2 == 0 else candidates[::-1]
        hold()
        pending = [(c, timed(c.graph.replay)) for c in order]
        torch.cuda.synchronize()
        for candidate, seconds in pending:
            candidate.times.append(seconds() * 1e6 / candidate.calls)


def summary(times):
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_us": middle, "spread": (high - low) / middle, "min_us": min(times), "max_us": max(times)}


def copy_bandwidth():
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    warm_up(lambda: target.copy_(source))
    seconds = []
    for _ in range(REPEATS):
        hold()
        pending = timed(lambda: target.copy_(source))
        torch.cuda.synchronize()
        seconds.append(pending())
    return 2 * COPY_BYTES / statistics.median(seconds)


@dataclass
class AppendTimes:
    """Microseconds of kvplan_append of one layer, where all sequences store a token."""
    plain: float
    packing: float     # every sequence packs a page
    begin_step: float  # of a step, which a model pays once for all its layers

    @property
    def mean(self):
        return ((PAGE_TOKENS - 1) * self.plain + self.packing) / PAGE_TOKENS


def append_times(library, plan, shape):
    """Graphs of appends to equal caches, one after the other as layers are. They depend on the step alone: a replay
    without another begin_step stores the same tokens at the same places."""
    small = replace(shape, context=APPEND_CONTEXT)
    k, v = random_vectors(2, shape.batch, shape.kv_heads, shape.head_dim)
    caches = []

    def step():
        for cache in caches:
            cache.begin_step(1)
        torch.cuda.synchronize()

    def microseconds(candidate):
        measure([candidate], REPEATS)
        return statistics.median(candidate.times)

    try:
        for _ in range(APPEND_CACHES):
            caches.append(PackedCache(library, plan, small))
            caches[-1].fill(read_plan(plan)["sink_tokens"] + PAGE_TOKENS - 2)
        step()
        plain = capture_warm("append", lambda i: caches[i].append(k, v), APPEND_CACHES)
        plain_us = microseconds(plain)
        step()  # the page's last token
        packing_us = microseconds(Candidate("append and pack", plain.graph, APPEND_CACHES, []))

        hold()
        seconds = timed(lambda: [caches[0].begin_step(1) for _ in range(STEPS_AHEAD)])
        torch.cuda.synchronize()
        return AppendTimes(plain_us, packing_us, seconds() * 1e6 / STEPS_AHEAD)
    finally:
        torch.cuda.synchronize()
        for cache in caches:
            cache.close()


class PackedCaches:
    """Equal caches of one plan, read in turn; the candidate that does it and the cost of appending."""

    def __init__(self, library, shape, item):
        self.append = append_times(library, item.plan, shape)
        self.caches = []
        try:
            for _ in range(item.copies):
                self.caches.append(PackedCache(library, item.plan, shape))
            self.prepare(shape, item)
        except RuntimeError:
            self.close()
            raise

    def prepare(self, shape, item):
        last = random_vectors(2, shape.batch, shape.kv_heads, shape.head_dim)
        for cache in self.caches:
            cache.fill(shape.context - 1)
            cache.begin_step(1)
            cache.append(*last)
        self.q = random_vectors(shape.batch, shape.query_heads, shape.head_dim)
        self.out = torch.empty_like(self.q)
        self.candidate = capture(
            item.plan.name, lambda i: self.caches[i % item.copies].attend(self.q, self.out),
            graph_calls(item.copies, item.stored_bytes))

    def close(self):
        torch.cuda.synchronize()
        for cache in self.caches:
            cache.close()


def capture_fp16(shape, l2_bytes):
    """The fp16 caches, the kernels worth timing, and microseconds or the refusal of every kernel."""
    copies = rotations(shape.fp16_bytes, l2_bytes)
    caches = Fp16Caches(shape, copies)
    kept, seen = [], {}
    for name, make in caches.kernels().items():
        try:
            candidate = capture(name, make(), graph_calls(copies, shape.fp16_bytes))
        except ImportError:
            continue  # not installed
        except RuntimeError as error:
            torch.cuda.synchronize()
            seen[name] = str(error).splitlines()[0]
            continue
        seconds = timed(candidate.graph.replay)
        torch.cuda.synchronize()
        seen[name] = seconds() * 1e6 / candidate.calls
        kept.append(candidate)
    best = min(seen[c.name] for c in kept)
    return caches, [c for c in kept if seen[c.name] <= SCREEN * best], seen


@dataclass
class Work:
    """A plan of a shape, with what it will take."""
    plan: pathlib.Path
    size: object
    copies: int
    stored_bytes: int

    @property
    def total_bytes(self):
        return self.copies * self.size.total


def plan_work(options, library, shape, device):
    """The plans of a shape that pass --rows."""
    out = []
    for name in chosen_plans(options, shape):
        plan = plan_folder(options, shape.kv_heads, shape.head_dim) / name
        size = library.size_of(plan, PackedCache.geometry(shape), device.multi_processor_count)
        stored = PackedCache.stored_bytes(size, shape, read_plan(plan)["sink_tokens"])
        out.append(Work(plan, size, rotations(stored, device.L2_cache_size), stored))
    return out


def in_groups(work, available):
    """Plans that fit into memory together, and those that do not fit alone."""
    groups, left, too_large = [], 0, []
    for item in work:
        if item.total_bytes > available:
            too_large.append(item)
        elif not groups or item.total_bytes > left:
            groups.append([item])
            left = available - item.total_bytes
        else:
            groups[-1].append(item)
            left -= item.total_bytes
    return groups, too_large


def row(shape, item, packed, fp16, seen, copy_rate):
    plan = read_plan(item.plan)
    ours = summary(packed.candidate.times)
    theirs = {c.name: summary(c.times) for c in fp16}
    best = min(theirs, key=lambda name: theirs[name]["median_us"])
    rate = item.stored_bytes / (ours["median_us"] * 1e-6)
    return {
        "shape": str(shape), "batch": shape.batch, "context": shape.context, "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "plan": item.plan.name,
        "effective_bits": plan["effective_bits"], "stored_bytes": item.stored_bytes, "fp16_bytes": shape.fp16_bytes,
        "copies": item.copies, "attend": ours, "terabytes_per_second": rate * 1e-12, "of_copy": rate / copy_rate,
        "fp16_best": best, "fp16": theirs, "fp16_first_replay": seen,
        "ratio": theirs[best]["median_us"] / ours["median_us"],
        "append_us": packed.append.mean, "append_share": packed.append.mean / ours["median_us"],
        "append_plain_us": packed.append.plain, "append_packing_us": packed.append.packing,
        "begin_step_us": packed.append.begin_step,
    }


def run_shape(options, library, shape, device, copy_rate):
    """Rows of a shape, and why others are missing."""
    def left(item, why):
        return {"shape": str(shape), "plan": item.plan.name, "why": why}

    work = plan_work(options, library, shape, device)
    free = MEMORY_SHARE * torch.cuda.mem_get_info()[0]
    fp16_bytes = shape.fp16_bytes * rotations(shape.fp16_bytes, device.L2_cache_size)
    if fp16_bytes > free:
        return [], [left(item, "fp16 does not fit into memory") for item in work]
    groups, too_large = in_groups(work, free - fp16_bytes)
    left_out = [left(item, "does not fit into memory beside fp16") for item in too_large]
    caches, fp16, seen = capture_fp16(shape, device.L2_cache_size)
    rows = []
    for group in groups:
        packed = {}
        try:
            for item in group:
                try:
                    packed[item.plan.name] = PackedCaches(library, shape, item)
                except RuntimeError as error:
                    left_out.append(left(item, str(error)))
            for candidate in fp16:
                candidate.times.clear()
            measure([p.candidate for p in packed.values()] + fp16, REPEATS)
            rows += [row(shape, item, packed[item.plan.name], fp16, seen, copy_rate)
                     for item in group if item.plan.name in packed]
        finally:
            for p in packed.values():
                p.close()
    return rows, left_out


def command_output(*command):
    """First line, or None where the program or the answer is missing."""
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def clocks():
    return command_output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu",
                          "--format=csv,noheader")


def measured_flags(options):
    """The options that say what was measured; where files lay is no part of a result."""
    flags = [f"--{name}" for name in ("quick", "check") if getattr(options, name)]
    return flags + ([f"--rows={options.rows.pattern}"] if options.rows.pattern else [])


def run_facts(options, device):
    folder = str(pathlib.Path(__file__).parent)
    return {
        "benchmark": "decode", "revision": options.revision or command_output("git", "-C", folder, "rev-parse", "HEAD"),
        "gpu": device.name, "multiprocessors": device.multi_processor_count, "l2_bytes": device.L2_cache_size,
        "driver": command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "flags": measured_flags(options), "repeats": REPEATS, "clocks_before": clocks(),
    }


def write_json(path, document):
    """Under a temporary name first, so that a killed run leaves the last whole file."""
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def check(options, library, shapes):
    """Relative errors per heads and plan; whether all are within the limit."""
    errors = {}
    for shape in shapes:
        for plan in chosen_plans(options, shape):
            name = f"{shape.query_heads}/{shape.kv_heads} d{shape.head_dim} {plan}"
            if name in errors:
                continue
            folder = plan_folder(options, shape.kv_heads, shape.head_dim)
            errors[name] = relative_error(library, folder / plan, shape.query_heads, CHECK_CONTEXTS)
            log(f"check {name}: relative error {errors[name]:.2e}")
    return errors, all(error < CHECK_LIMIT for error in errors.values())


def dry_run(options, shapes):
    """Rows with bytes, from the plans alone."""
    for shape in shapes:
        for name in chosen_plans(options, shape):
            plan = read_plan(plan_folder(options, shape.kv_heads, shape.head_dim) / name)
            stored = shape.batch * shape.context * plan["bytes_per_token"]
            print(f"{shape} {name}: {stored / 1e9:.3f} GB packed, {shape.fp16_bytes / 1e9:.3f} GB fp16")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--library", type=pathlib.Path, help="libkvplan_runtime.so")
    p.add_argument("--plans-program", default="decode_plans", help="writes plans that --plans lacks")
    p.add_argument("--plans", type=pathlib.Path, required=True, help="folder of the plans")
    p.add_argument("--out", type=pathlib.Path, help="results, JSON")
    p.add_argument("--quick", action="store_true", help="the shapes of the targets alone")
    p.add_argument("--rows", type=re.compile, default=re.compile(""),
                   help="regular expression on names such as '64x8k 32/8 d128 bits4'")
    p.add_argument("--seconds", type=float, default=540, help="no shape begins later than this")
    p.add_argument("--check", action="store_true", help="compare with attention over what is read back first")
    p.add_argument("--revision", help="of the sources, where git does not say")
    p.add_argument("--dry-run", action="store_true", help="print the rows and their bytes; no GPU")
    options = p.parse_args()
    if not options.dry_run and not (options.library and options.out):
        p.error("--library and --out are needed, or --dry-run")
    return options


def main():
    options, start = parse(), time.monotonic()
    shapes = [s for s in (TARGETS if options.quick else grid()) if chosen_plans(options, s)]
    if options.dry_run:
        return dry_run(options, shapes)
    library = Library(options.library)
    device = torch.cuda.get_device_properties(0)
    document = run_facts(options, device) | {"rows": [], "left_out": []}
    if options.check:
        document["check"], passed = check(options, library, shapes)
        if not passed:
            write_json(options.out, document)
            sys.exit(f"relative errors reach {CHECK_LIMIT} or more: see check in {options.out}")
    copy_rate = copy_bandwidth()
    torch.cuda.empty_cache()
    document["copy_terabytes_per_second"] = copy_rate * 1e-12
    log(f"{device.name}: copy {copy_rate * 1e-12:.2f} TB/s")
    for shape in shapes:
        if time.monotonic() - start > options.seconds:
            document["left_out"].append({"shape": str(shape), "plan": "", "why": "no time left"})
            continue
        rows, left_out = run_shape(options, library, shape, device, copy_rate)
        torch.cuda.empty_cache()
        document["rows"] += rows
        document["left_out"] += left_out
        document["clocks_after"], document["seconds"] = clocks(), time.monotonic() - start
        write_json(options.out, document)
        for r in rows:
            log(f"{r['shape']} {r['plan']}: {r['attend']['median_us']:.1f} us, {r['of_copy']:.2f} of copy, "
                f"{r['ratio']:.2f}x of {r['fp16_best']}, append {100 * r['append_share']:.1f} %")
        log(f"{shape}: {time.monotonic() - start:.0f} s so far")
    write_json(options.out, document)


if __name__ == "__main__":
    main()
