"""Hook points, the table that declares them, and running a module with hooks on them."""
