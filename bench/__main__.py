"""``python -m bench``: every benchmark of the repository."""

import sys

from bench.compile_time import main

sys.exit(main())
