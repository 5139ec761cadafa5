"""Side-by-side measurements against peers. Scripts, not a package to import: nothing else imports them."""
