def check_strict(*a): pass
