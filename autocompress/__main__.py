"""`python -m autocompress` and the `autocompress` script."""

from autocompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
