"""``python -m ggufrq``."""

from ggufrq.cli import main

if __name__ == "__main__":
    main()
