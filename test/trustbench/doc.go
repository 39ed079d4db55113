// Command trustbench measures how long it takes from a CA Secret's change until
// nodes trust what it holds now: on a real cluster of two nodes with the product
// installed by helm, and with many agents, each with a node root, a client and a
// connection of its own, in one process against a real API server.
//
// A node trusts a CA when the file that its hosts.toml names holds it. It is
// looked at every few milliseconds, so what is told is never less than what it
// took. It needs root, for the cluster's sake: see test/cluster.
package main
