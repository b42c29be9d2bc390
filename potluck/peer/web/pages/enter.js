// The token came in the address: go on without it, and leave no trace of it in the history.
location.replace("/");
