package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/containerd/log"
	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/node"
)

// errFaults makes the exit status tell.
var errFaults = errors.New("there are faults: see above")

func doctorCommand() *cobra.Command {
	var f doctorFlags
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Explain one node: its container runtime, and where its pulls go",
		Long: `Explains one node and changes nothing: which container runtime it has and by
which configuration, whether that makes the runtime read the hosts directory,
and what to do about each fault.

With --image, it also says which hosts are asked for an image, in their order,
read with containerd's own code; asks each of them whether it is there and its
certificate verifies; and says whether anybody but the mirror has the image.
The mirror's own images must not depend on it: give them as --own-image.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context(), cmd.OutOrStdout()) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.nodeRoot, "node-root", "/", "directory in which the node's file system is found")
	flags.StringArrayVar(&f.images, "image", nil, "image reference to follow; may be repeated")
	flags.StringArrayVar(&f.own, "own-image", ownImages(), "image of the connected registry itself; may be repeated (default $CONNECTED_REGISTRY_IMAGE)")
	flags.StringVarP(&f.output, "output", "o", "table", "output format: table or json")
	return cmd
}

// ownImages is what the chart says of its own image.
func ownImages() []string {
	if image := os.Getenv("CONNECTED_REGISTRY_IMAGE"); image != "" {
		return []string{image}
	}
	return nil
}

type doctorFlags struct {
	nodeRoot    string
	images, own []string
	output      string
}

// diagnosis is what doctor found.
type diagnosis struct {
	Node   node.Detection `json:"node"`
	Steps  []string       `json:"steps,omitempty"`
	Images []imageRoute   `json:"images,omitempty"`
}

type imageRoute struct {
	node.Route
	Own   bool   `json:"own,omitempty"`
	Error string `json:"error,omitempty"`
}

func (f *doctorFlags) run(ctx context.Context, stdout io.Writer) error {
	if f.output != "table" && f.output != "json" {
		return fmt.Errorf("output format %q: use table or json", f.output)
	}
	// What containerd's code logs about broken files is said here in full.
	if err := log.SetLevel("fatal"); err != nil {
		return err
	}
	found, err := f.diagnose(ctx)
	if err != nil {
		return err
	}
	if f.output == "json" {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		err = encoder.Encode(found)
	} else {
		err = found.print(stdout)
	}
	if err == nil && found.isFaulty() {
		err = errFaults
	}
	return err
}

func (f *doctorFlags) diagnose(ctx context.Context) (diagnosis, error) {
	d, err := node.Detect(ctx, f.nodeRoot)
	if err != nil {
		return diagnosis{}, err
	}
	plan, err := node.NewPlan(ctx, f.nodeRoot, d)
	if err != nil {
		return diagnosis{}, err
	}
	out := diagnosis{Node: d, Steps: plan.Steps}
	follow := func(images []string, own bool) {
		for _, image := range images {
			route, err := node.FindRoute(ctx, f.nodeRoot, d, image)
			r := imageRoute{Route: route, Own: own}
			if err != nil {
				r.Error, r.Verdict = err.Error(), node.Fault
			}
			if own && r.DependsOnMirror {
				r.Verdict = node.Fault
			}
			out.Images = append(out.Images, r)
		}
	}
	follow(f.images, false)
	follow(f.own, true)
	return out, nil
}

func (d diagnosis) isFaulty() bool {
	faulty := d.Node.Verdict == node.Fault
	for _, i := range d.Images {
		faulty = faulty || i.Verdict == node.Fault
	}
	return faulty
}

func (d diagnosis) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VERDICT\tFINDING\tVALUE\tEVIDENCE")
	for _, f := range d.Node.Findings {
		evidence := ""
		if f.Evidence != nil {
			evidence = f.Evidence.String()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", f.Verdict, f.Name, f.Value, evidence)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	d.printSteps(out)
	for _, i := range d.Images {
		if err := i.print(out); err != nil {
			return err
		}
	}
	return nil
}

// printSteps says what to do: the remedies, and the plan in full.
func (d diagnosis) printSteps(out io.Writer) {
	for _, f := range d.Node.Findings {
		if f.Remedy != "" {
			fmt.Fprintf(out, "\n%s: %s\n", f.Name, f.Remedy)
		}
	}
	if len(d.Steps) == 0 {
		return
	}
	fmt.Fprintln(out, "\nTO DO")
	for i, step := range d.Steps {
		fmt.Fprintf(out, "%d. %s\n", i+1, strings.ReplaceAll(strings.TrimSpace(step), "\n", "\n   "))
	}
}

func (r imageRoute) print(out io.Writer) error {
	fmt.Fprintf(out, "\nIMAGE %s\n", r.Image)
	if r.Error != "" {
		_, err := fmt.Fprintf(out, "fault: %s\n", r.Error)
		return err
	}
	if r.File != "" {
		fmt.Fprintf(out, "by %s\n", r.File)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ASKED\tVERDICT\tHOST\tFOR\tANSWER")
	for i, h := range r.Hosts {
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\n", i+1, h.Verdict, h.URL, strings.Join(h.Capabilities, ","), h.Answer)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, h := range r.Hosts {
		if h.Remedy != "" {
			fmt.Fprintf(out, "%s: %s\n", h.URL, h.Remedy)
		}
	}
	switch {
	case r.Own && r.DependsOnMirror:
		fmt.Fprintln(out, "fault: nobody but the mirror has this image of the mirror's own: take it from another registry, or load it on every node")
	case r.DependsOnMirror:
		fmt.Fprintln(out, "Nobody but the mirror has this image.")
	}
	return nil
}
