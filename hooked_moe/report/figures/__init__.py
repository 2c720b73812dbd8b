"""The figures of a run, one idea a file: each is a table of numbers and a drawing of it (`drawing.Drawing`).

A module's function named after the figure selects the numbers from a derived table; its `draw_*` sees nothing but those
numbers, which are saved beside the picture as csv.
"""
