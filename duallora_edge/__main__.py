"""``python -m duallora_edge`` is the same as the ``duallora-edge`` command."""

from duallora_edge.cli import main

if __name__ == "__main__":
    main()
