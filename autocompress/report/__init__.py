"""Reading a finished search: tables, figures, the page. None of it needs torch."""
