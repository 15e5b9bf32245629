"""`python -m hasten` is `hasten`."""

from hasten.cli import main

raise SystemExit(main())
