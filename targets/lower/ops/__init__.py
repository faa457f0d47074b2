"""The emitters of the operators, one file a family; `registry` puts their tables together."""
