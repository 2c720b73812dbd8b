"""What makes parts of the documentation: pictures, tables, notebooks and the site."""
