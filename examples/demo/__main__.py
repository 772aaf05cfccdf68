"""python -m examples.demo [--max_steps N] [--output_dir DIR] [--seed N]"""

from examples.demo.demo import main

raise SystemExit(main())
