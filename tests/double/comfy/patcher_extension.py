"""Names of the places where a MODEL can be wrapped."""


class WrappersMP:
    CALC_COND_BATCH = "calc_cond_batch"
