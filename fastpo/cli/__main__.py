"""``python -m fastpo.cli``, the form that ``accelerate launch -m fastpo.cli train …`` starts."""

import sys

from fastpo.cli import main

sys.exit(main())
