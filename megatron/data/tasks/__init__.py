"""Classification and multiple-choice tasks: files to rows, rows to samples."""
