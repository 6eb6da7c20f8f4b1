package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/hamesh/hamesh/cli/pki"
)

func (c *command) pkiCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "pki",
		Short: "Make the certificates of a mesh",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("pki needs a command: init or issue")
		},
	}
	cmd.AddCommand(c.pkiInitCommand(), c.pkiIssueCommand())
	return cmd
}

func (c *command) pkiInitCommand() *cobra.Command {
	var dir, mesh string
	cmd := &cobra.Command{
		Use:   "init --dir D --mesh M",
		Short: "Make a CA: D/ca.crt and D/ca.key, good for ten years",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return c.made(pki.Init(dir, mesh))
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory of the CA, made where it is missing")
	cmd.Flags().StringVar(&mesh, "mesh", "", "name of the mesh, as in agent.yaml")
	require(cmd, "dir", "mesh")
	return cmd
}

func (c *command) pkiIssueCommand() *cobra.Command {
	var dir, role string
	var addresses []string
	var request pki.Request
	cmd := &cobra.Command{
		Use:   "issue --dir D --name N --role agent|operator|viewer [--address A]...",
		Short: "Issue a certificate: D/N.crt and D/N.key",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var err error
			if request.Role, err = pki.ParseRole(role); err != nil {
				return err
			}
			for _, text := range addresses {
				address, err := netip.ParseAddr(text)
				if err != nil {
					return fmt.Errorf("address %q is no IP address", text)
				}
				request.Addresses = append(request.Addresses, address)
			}
			return c.made(pki.Issue(dir, request))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&dir, "dir", "", "directory of the CA")
	flags.StringVar(&request.Name, "name", "", "the member, for an agent; else who or what uses the certificate")
	flags.StringVar(&role, "role", "", "agent, operator or viewer")
	flags.StringSliceVar(&addresses, "address", nil, "IP addresses of an agent's node")
	flags.DurationVar(&request.Validity, "validity", pki.DefaultValidity, "how long it is good")
	flags.BoolVar(&request.Replace, "force", false, "replace the files, to renew the certificate")
	require(cmd, "dir", "name", "role")
	return cmd
}

func require(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		// It fails only where there is no such flag.
		if err := cmd.MarkFlagRequired(flag); err != nil {
			panic(err)
		}
	}
}

// made reports the files that were made, or why not.
func (c *command) made(files pki.Files, err error) error {
	switch {
	case err == nil:
		return c.print(files.Cert + "\n" + files.Key + "\n")
	case errors.Is(err, pki.ErrInvalid):
		return err
	case errors.Is(err, pki.ErrExists):
		return &failure{status: exitFailed, what: err.Error(), hint: "choose another --dir or --name; hactl pki issue --force renews"}
	case errors.Is(err, fs.ErrNotExist):
		return &failure{status: exitFailed, what: err.Error(), hint: "make the CA first: hactl pki init"}
	}
	return &failure{status: exitFailed, what: err.Error(), hint: "check the directory and the CA in it"}
}
