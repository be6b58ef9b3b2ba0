"""Networks: shapes and parameters, no losses."""
