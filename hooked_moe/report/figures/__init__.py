"""The figures of a run, one idea a file. Each is a table of numbers and a drawing of it (`drawing.Drawing`).

A module's function named after the figure selects the numbers from a derived table; its `draw_*` sees only those
numbers, which are saved beside the picture as csv.
"""
