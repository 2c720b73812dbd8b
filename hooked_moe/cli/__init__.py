"""The commands of `hooked-moe`, one module each, and what they share.

    main            the table of commands, and `hooked-moe` itself
    audit, control, progressive, redistribution     the experiments
    compare-runs    two audits side by side
    compare         measured beside published tables        paper       all of the above on several models
    verify          is a checkpoint the published one, and is it run as transformers runs it
    console         a parser that shows examples, errors in one line
    options         the options that say what is measured
    measured_run    a run of the defined protocol, opened from the options, analysed and reported
    released_run    the same for `--protocol as_released`
    parity_checks, published_checkpoints            what `verify` checks, and what it compares with

Nothing else in the package imports this room.
"""
