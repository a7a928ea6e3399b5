"""A run and its directory: started, resumed, measured, replayed."""
