"""The GPU suite's sections: `python3 -m bench.gpu` runs them from a bare checkout with nothing but torch and triton."""
