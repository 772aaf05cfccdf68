"""Benchmarks: `python -m bench` on the CPU, `python3 -m bench.gpu` on a GPU, `pytest bench --benchmark-only`.

suites/         one file an op: what is compared, on which inputs (those of tests/cases.py), and how it is checked
measure.py      check first, then time interleaved; a wrong result gets no time
clocks.py       how a call is timed on the CPU and on CUDA
ceilings.py     copy bandwidth and GEMM speed of this machine, in the same run
peers.py        dense torch, bitsandbytes, PEFT and torchao over the same operands
by_hand.py, compiled.py         LoRA from separate torch calls (as Unsloth does it, too), and by torch.compile
report.py, charts.py, files.py, environment.py      what is written, and where
device/         the sections of the GPU suite; tune.py measures the crossovers, graphs.py captures, aims.py judges
"""
