"""The summary of a run: python -m sid.report RUN_FOLDER"""

from sid.report.progress import main

if __name__ == "__main__":
    main()
