"""Who is credited with what: scoring contributions by their loss delta, consensus over validators, the ledger."""
