"""``python -m lazycache``: the command."""

import sys

from .cli import main

sys.exit(main())
