"""The GPU suite's sections: `python3 -m bench.gpu` runs them from a bare checkout with torch, numpy and triton."""
