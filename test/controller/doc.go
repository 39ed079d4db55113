// Package controller runs the program's commands syncer and registry, as
// processes that can be killed and cut off, against a real API server; there are
// no nodes. It needs root, for the server's sake: see test/cluster.
package controller
